"""`orchard-infra doctor`: whether runs can be protected here."""
