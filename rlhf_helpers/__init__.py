"""Helpers of the course on RLHF with PPO: every module is one lesson in code. Start with `ppo.py` and `trainer.py`."""

import logging
import warnings

# On CPUs with AVX512-BF16, importing bitsandbytes says that an optional speed-up could not be fetched from a model hub.
# This course needs no hub and turns that kernel off (see models.keep_gradients), so this one sentence is left out.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in record.getMessage()
)

# tqdm, when another package imports it inside a notebook, asks for ipywidgets. The course shows no progress bars.
warnings.filterwarnings("ignore", "IProgress not found")

# peft 0.21 asks transformers 5.23 for an attribute by its old name, whenever it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
