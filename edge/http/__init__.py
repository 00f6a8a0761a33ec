"""HTTP: OpenAI's API, health, metrics and the web page, over :mod:`edge.service`."""
