"""Everything that samples completions: vLLM, vLLM servers, Hugging Face; the server of a teacher."""
