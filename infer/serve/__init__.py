"""The HTTP server: the API of OpenAI and a chat page over one engine."""
