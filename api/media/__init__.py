"""From a media URL to uint8 patches in a file: fetch in the api, decode in processes of their own."""
