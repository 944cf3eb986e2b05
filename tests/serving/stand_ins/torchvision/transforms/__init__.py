"""See the package's own page."""

from torchvision import __getattr__ as __getattr__
