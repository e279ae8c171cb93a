"""The OpenAI API over HTTP, a page to look at, and the engine in a process of its own."""
