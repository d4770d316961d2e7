"""Questions, demonstrations, prompts, chat templates and layouts of data sets; loads no torch."""
