"""A bundle behind OpenAI's HTTP interface: requests, the queue of one loaded session, and the web application."""
