"""Files of other tools: read vectors in seven formats and GLP, write adapters for PEFT and GLP."""
