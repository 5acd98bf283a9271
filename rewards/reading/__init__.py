"""Text in pictures: engines that read it, and how alike two texts are."""
