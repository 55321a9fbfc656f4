"""What a run consists of: arms, shards, stages and pipelines. Pure: nothing here touches a disk."""
