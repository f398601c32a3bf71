"""What stands between the network and the gateway's handlers."""
