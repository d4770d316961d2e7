"""The model that learns: loading, devices, FSDP, LoRA, optimizer, weights to push."""
