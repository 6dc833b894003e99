"""The names of everything in a run's folder, in one place: who writes a name and who reads one ask here. No torch."""

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
