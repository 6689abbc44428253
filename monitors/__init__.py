"""Watches acceptance, judges versions, alerts, and shows it all to an operator."""
