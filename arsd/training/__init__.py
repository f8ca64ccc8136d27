"""Training of the shipped models: data, VQ tokenizer and autoregressive target, each resumable."""
