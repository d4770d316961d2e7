"""Questions, demonstrations, prompts and chat templates; loads no torch."""
