"""Checkpoints of compressed models: the plan in the config, the manifest, the model card, all checks."""
