"""Models on a server that speaks OpenAI's API: a client that looks like what a chat needs."""
