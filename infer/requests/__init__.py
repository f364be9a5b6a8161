"""Requests and conversations: what is asked, as ids, and what came of it."""
