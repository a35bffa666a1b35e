"""Files of other tools: read vectors in seven formats, write adapters for PEFT."""
