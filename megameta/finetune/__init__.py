"""Fine-tuning on prompts and answers, in phases of growing length, and exact-match scoring."""
