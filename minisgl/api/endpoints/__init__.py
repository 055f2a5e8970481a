"""One file for each shape of request and answer: OpenAI's, Anthropic's, SGLang's."""
