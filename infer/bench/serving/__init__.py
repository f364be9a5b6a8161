"""A load generator for servers of OpenAI's API, and what its clients measure."""
