"""Names of lists and the items in them: common English words, most of them one token of GPT-2's vocabulary."""

_TEXT = """
Fruits: apple orange peach banana plum grape lemon cherry mango pear lime melon fig berry date olive
    papaya apricot coconut kiwi
Tools: hammer wrench level pliers saw drill axe chisel file clamp shovel rake knife ladder rope nail
    screw bolt tape brush
Colors: red blue green yellow black white brown pink purple gray silver gold violet scarlet navy
    ivory amber crimson teal tan
Animals: dog cat horse cow sheep goat pig wolf fox bear lion tiger deer rabbit mouse rat camel
    monkey whale seal
Birds: eagle hawk owl crow robin sparrow swan goose duck dove parrot turkey penguin raven falcon
    crane stork finch gull wren
Fish: salmon trout tuna cod shark eel carp bass pike perch herring sole ray marlin snapper grouper
    flounder halibut anchovy sardine
Trees: oak pine maple birch cedar elm ash willow palm spruce fir beech walnut cypress poplar holly
    juniper alder hickory redwood
Flowers: rose lily tulip daisy orchid violet iris poppy lotus jasmine lilac peony carnation daffodil
    marigold lavender sunflower aster dahlia heather
Metals: iron copper gold silver zinc tin lead nickel steel bronze brass aluminum titanium platinum
    mercury chrome cobalt tungsten lithium sodium
Countries: France Spain Italy Germany Russia China Japan India Brazil Canada Mexico Egypt Kenya Peru
    Chile Cuba Iran Iraq Turkey Greece
Cities: London Paris Rome Berlin Madrid Vienna Moscow Tokyo Boston Chicago Dallas Denver Miami
    Seattle Sydney Dublin Lisbon Prague Milan Athens
Sports: football tennis golf hockey boxing rugby cricket skiing rowing fencing cycling swimming
    running wrestling sailing surfing diving climbing archery baseball
Clothes: shirt coat hat dress shoe boot sock glove scarf belt jacket skirt sweater suit tie vest
    robe cap jeans apron
Furniture: chair table bed desk lamp shelf sofa bench stool cabinet mirror drawer rug couch dresser
    cradle wardrobe bookcase crib curtain
Vehicles: car truck bus train boat ship plane bike tractor van taxi tram ferry canoe rocket wagon
    sled scooter yacht helicopter
Instruments: piano guitar violin drum flute trumpet harp cello organ horn banjo oboe tuba bell
    clarinet bassoon accordion fiddle lute viola
Foods: bread rice cheese soup meat salad pasta cake pie egg butter honey sugar salt bean corn cookie
    pizza sandwich steak
Drinks: water milk tea coffee juice wine beer cider soda cocoa rum whiskey brandy gin vodka lemonade
    punch cola broth cream
Body: hand foot head arm leg eye ear nose mouth neck knee elbow shoulder finger toe heart lung bone
    skin hair
Jobs: doctor nurse teacher lawyer farmer baker cook driver pilot judge actor singer painter writer
    soldier sailor tailor butcher miner clerk
Weather: rain snow wind storm fog hail cloud thunder frost sun heat mist ice lightning breeze
    drought flood tornado hurricane drizzle
Planets: Mercury Venus Earth Mars Jupiter Saturn Neptune Pluto Moon Sun Titan Europa Io Ceres Comet
    Meteor Star Galaxy Nova Orion
Buildings: house church school tower castle bank hotel barn temple palace library museum factory
    prison theater station market garage chapel cabin
Rooms: kitchen bedroom bathroom attic cellar hall office closet garage pantry lobby porch den study
    nursery parlor balcony basement ballroom corridor
Gems: diamond ruby emerald pearl opal jade amber topaz garnet sapphire crystal quartz coral amethyst
    turquoise onyx agate jasper zircon beryl
Shapes: circle square triangle cube sphere cone line star oval ring cross arrow wave spiral arch
    prism cylinder diamond rectangle pyramid
Insects: ant bee fly wasp moth beetle spider cricket flea mosquito butterfly worm locust hornet tick
    louse termite dragonfly grasshopper ladybug
Vegetables: carrot potato onion pea bean corn cabbage tomato pepper spinach celery garlic lettuce
    radish turnip pumpkin leek beet squash cucumber
Materials: wood stone glass paper cloth leather rubber plastic clay sand wool silk cotton wax cement
    brick ivory marble foam wire
Games: chess poker bridge darts bingo dominoes checkers marbles tag cards dice puzzles hopscotch
    backgammon roulette pool bowling croquet solitaire charades
Months: January February March April May June July August September October November December spring
    summer autumn winter Monday Tuesday Friday Sunday
Rivers: Nile Amazon Danube Rhine Thames Volga Ganges Congo Seine Jordan Indus Niger Ohio Hudson
    Mississippi Missouri Colorado Columbia Delaware Potomac
"""


def _categories() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for word in _TEXT.split():
        if word.endswith(":"):
            items = found.setdefault(word[:-1], [])
        else:
            items.append(word)
    return {name: tuple(items) for name, items in found.items()}


#: Items by the name of their list; 32 names of 20 items.
CATEGORIES = _categories()
#: All items, each once.
WORDS = tuple(dict.fromkeys(item for items in CATEGORIES.values() for item in items))
