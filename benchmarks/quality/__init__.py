"""The study of unlearning quality: its tasks, runs, summary and checks."""
