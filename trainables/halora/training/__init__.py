"""Models, tasks, the HaLoRA loss, noise schedules and the DeepSpeed engine."""
