"""What is said of generated text beside the text that was trained on."""
