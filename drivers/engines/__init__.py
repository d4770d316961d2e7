"""Everything that samples completions: vLLM, vLLM servers, Hugging Face."""
