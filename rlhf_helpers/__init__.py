"""Helpers of the course on RLHF with PPO. The core is flat, and every module is one lesson in code: start with `ppo.py` and
`trainer.py`. What serves the pages (exercises, figures, the annotator's rule) is in `course/`."""

from rlhf_helpers.quirks import same_bits_for_any_rows, silence

__version__ = "0.2.0"

silence()
same_bits_for_any_rows()
