"""Published checkpoints: the authors' layout, read into ours."""
