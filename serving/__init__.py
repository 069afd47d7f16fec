"""One frozen proposal and many aligners behind OpenAI's protocol: engine, server, chat, FastChat's worker."""
