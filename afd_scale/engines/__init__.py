"""What steps networks: sharded by DeepSpeed ZeRO-3, or plain on one device. A cast is built the same way of either."""
