"""OpenAI's protocol over HTTP, on the engine (docs/serving.md). It needs the packages of requirements-serve.txt."""
