"""The processes of a node: the agent, its fork server and its workers."""
