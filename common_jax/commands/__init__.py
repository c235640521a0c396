"""Commands that both programs share; what differs between packages is passed as arguments."""
