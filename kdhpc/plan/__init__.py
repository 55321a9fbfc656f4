"""Arms, shards, stages and pipelines: what a run consists of. Nothing here touches a disk."""
