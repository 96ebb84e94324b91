"""What any run stands on: options, files, processes, the run folder, shards, video. It knows no method and no stage."""
