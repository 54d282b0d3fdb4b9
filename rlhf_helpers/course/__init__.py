"""What serves the pages of the course, and a reader of PPO need not see: exercises, their grading, figures, the annotator's rule."""
