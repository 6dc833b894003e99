"""What is uploaded to the hub, and its model card."""
