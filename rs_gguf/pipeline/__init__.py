"""Run the stages of a recipe in a folder, and plan what they cost."""
