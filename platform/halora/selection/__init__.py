"""From a sweep's trials to one adapter that may be deployed: gates, yield certificate, registry, bundle."""
