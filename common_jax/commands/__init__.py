"""Commands that both programs have, with what a package must tell them as arguments."""
