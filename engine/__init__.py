"""Messages in, text out: the inference engine. It knows nothing of HTTP."""
