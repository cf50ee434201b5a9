"""Published checkpoints to the decoder's parameters: Hugging Face folders and GGUF files of the Llama family."""
