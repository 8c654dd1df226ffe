from tqext.commands.cli import main

main()
