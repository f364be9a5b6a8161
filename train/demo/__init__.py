"""The bundled demo model: its questions and answers, its tokenizer, and how it is trained."""
