"""Training online: prompts, answers, rewards, advantages, critics."""
