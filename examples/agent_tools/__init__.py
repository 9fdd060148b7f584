"""`python -m examples.agent_tools`: an agent that learns to use a calculator, over OpenAI's API."""
