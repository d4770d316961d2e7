"""Words that count things: `37 apples` is 37. Each word is safe, because it never changes the number before it."""

import re


def _words(text: str) -> list[str]:
    return text.split()


_NOUNS = _words("""
apple orange banana pear peach plum cherry grape lemon lime melon watermelon strawberry blueberry raspberry berry
mango pineapple coconut fruit vegetable carrot potato tomato onion pepper pumpkin cabbage bean pea corn cucumber egg
bread loaf roll bagel bun muffin cake cupcake cookie biscuit cracker pie pizza slice sandwich burger hamburger hotdog
taco burrito pancake waffle donut doughnut candy chocolate lollipop gum jellybean sweet snack chip nut peanut almond
popcorn icecream meal lunch dinner breakfast dish dessert drink juice soda coke cola coffee tea latte milkshake
smoothie cheese butter jam jar can bottle carton pack package packet box bag basket bucket crate case container
barrel tray bowl plate cup mug spoon fork knife pot pan napkin tablet pill capsule dose serving portion piece bite
scoop recipe ingredient batch steak sausage nugget shrimp meatball rib person man woman child kid boy girl baby adult
teenager student pupil teacher professor principal coach player teammate member guest visitor customer client worker
employee employer manager driver passenger rider doctor nurse patient dentist engineer farmer soldier sailor pirate
king queen princess knight friend neighbor neighbour cousin brother sister sibling mother father mom dad parent
grandparent grandchild son daughter aunt uncle family couple tourist traveler camper scout volunteer artist singer
dancer actor musician author writer reader runner swimmer jogger cyclist walker shopper buyer seller voter juror
candidate winner finalist contestant participant attendee applicant resident citizen inhabitant villager people human
team class classroom club committee crew staff crowd animal pet dog puppy cat kitten rabbit bunny hamster mouse rat
bird parrot duck duckling goose chicken hen rooster chick turkey eagle owl pigeon crow swan penguin fish goldfish
shark whale dolphin octopus crab lobster turtle frog toad snake lizard crocodile alligator dinosaur dragon spider ant
bee butterfly beetle bug insect fly mosquito snail worm caterpillar ladybug cricket horse pony donkey cow bull calf
ox sheep lamb goat pig piglet deer moose bear wolf fox lion tiger leopard elephant giraffe zebra monkey gorilla
kangaroo koala panda camel llama bat squirrel raccoon leg wing tail feather paw horn eye ear finger toe hand arm
tooth hair tree bush plant flower rose tulip daisy lily sunflower petal leaf branch seed root garden flowerpot
bouquet rock stone pebble shell seashell gem diamond pearl ruby crystal log stick twig acorn hill mountain island
lake pond river field farm orchard vine cactus mushroom weed nest hive cloud star planet moon book notebook textbook
magazine newspaper comic page chapter paragraph sentence word letter character line verse story poem novel article
essay report paper sheet folder binder envelope stamp postcard card invitation note message email text call pen
pencil crayon marker eraser ruler stapler scissor brush paintbrush sticker poster picture photo photograph painting
drawing map puzzle game toy doll teddy ball balloon basketball football baseball soccer kite robot block lego bead
marble token coin penny nickel dime bill ticket coupon voucher prize medal trophy badge ribbon button bow bracelet
necklace ring earring watch clock key lock bell candle lamp light bulb lightbulb battery phone cellphone telephone
computer laptop printer screen camera television movie film video song album disc disk record channel episode show
concert performance program download file app device machine engine tool hammer nail screw shirt tshirt pant trouser
dress skirt blouse jacket coat sweater hat cap scarf glove mitten sock shoe boot sandal sneaker uniform costume
suit tie belt purse wallet backpack suitcase luggage umbrella pillow blanket towel curtain rug carpet mat house home
apartment building room bedroom bathroom floor wall window door gate fence roof stair step table chair desk bench
couch sofa bed shelf bookshelf bookcase drawer cabinet closet locker seat row column aisle station stop school
university office store shop market restaurant hotel hospital library museum park playground zoo church bank factory
warehouse garage barn stable tent cabin bridge tunnel tower castle street road highway lane village town city country
state county district intersection car truck van bus taxi train tram subway bicycle bike tricycle motorcycle scooter
unicycle skateboard boat ship canoe kayak raft sailboat ferry plane airplane helicopter rocket wagon cart vehicle
wheel tire tyre trip ride flight lap round mile board plank brick tile pipe rope string wire chain beam panel pane
bar rod pole post stake order sale purchase item product unit good object thing stuff model sample copy version
edition point goal score shot run homer touchdown hit strike match set inning quarter win victory tournament question
problem exercise quiz test exam assignment lesson course subject grade mark credit topic project task chore job shift
meeting party holiday vacation birthday event session visit appointment break interview way method choice option
possibility outcome arrangement ordering seating path route walk move combination selection sequence subsequence code
password pattern color colour shape figure symbol sign triangle rectangle quadrilateral parallelogram rhombus
trapezoid pentagon hexagon octagon polygon circle ellipse sphere cube prism pyramid cone cylinder polyhedron
tetrahedron segment ray arc chord diagonal edge side vertex corner angle face region area axis intercept asymptote
parabola curve graph grid cell number integer digit value solution element subset group function term factor divisor
multiple polynomial equation inequality variable coefficient matrix pair triple triplet quadruple tuple lattice
toothpick matchstick dot dash flag bundle stack pile heap bunch kilometer meter gallon liter vote dollar cent
share stock bond ounce spoonful teaspoonful tablespoonful cupful handful bagful basketful signature ad advertisement
subscriber follower like view comment click patch square quilt yarn thread needle bobbin stitch petunia beaver otter
seal walrus hippo rhino cheetah kiwi fig apricot nectarine cantaloupe avocado radish turnip beet celery lettuce
spinach zucchini eggplant squash garlic ginger kernel pod stem pinecone trunk calorie person-hour inch foot pound
light-year yo-yo bolt washer gear spring hinge lever pulley magnet wrench saw drill gnome elf fairy witch wizard
ghost monster alien zombie mermaid unicorn giant dwarf ogre superhero villain grandmother grandfather grandma grandpa
niece nephew husband wife toddler infant senior junior freshman sophomore graduate classmate roommate coworker
colleague boss chef cook waiter waitress baker butcher barber tailor carpenter plumber painter electrician mechanic
pilot astronaut scientist lawyer judge police policeman firefighter detective thief clown magician acrobat drummer
guitarist pianist violinist cheerleader referee umpire goalie pitcher batter striker defender athlete gymnast skater
skier surfer diver climber hiker golfer bowler fisherman hunter cowboy shepherd gardener landscaper janitor librarian
secretary cashier clerk salesperson salesman agent broker banker landlord tenant homeowner donor sponsor partner
owner founder investor lawmaker senator president mayor cranberry blackberry lychee papaya guava raisin prune olive
cashew walnut pecan pistachio hazelnut oat cereal granola oatmeal toast pretzel popsicle lolly caramel toffee
marshmallow brownie cheesecake pastry croissant tart pudding pickle kale leek yam herb spice wrap salad soup stew
noodle dumpling sushi fillet drumstick patty kebab omelet omelette gumball gumdrop candybar peppermint taffy wafer
sundae float shake lemonade cider wine beer milk water trousers sari robe vest tuxedo gown hoodie jean jeans legging
pajama slipper heel stocking apron bib diaper bandana headband helmet goggle sunglass locket pendant charm pin buckle
zipper spool cloth fabric cushion mattress armchair stool rack hook hanger hamper basin sink faucet toilet shower tub
mirror vase frame calendar fan heater stove oven microwave toaster blender kettle refrigerator fridge freezer
dishwasher dryer vacuum broom mop sponge soap shampoo lotion perfume toothbrush razor comb hairbrush hairpin tissue
diary journal atlas dictionary encyclopedia workbook handout worksheet flashcard bookmark pamphlet brochure flyer
newsletter manuscript script speech lecture seminar workshop conference semester chalk tape paperclip thumbtack
highlighter compass protractor calculator whiteboard blackboard chalkboard frisbee puck racket racquet skate ski sled
snowboard surfboard paddle oar net hoop dart arrow dumbbell weight treadmill pushup push-up situp sit-up pullup jump
hop skip leap throw pass catch tackle free-throw three-pointer foul pitch swing hole domino chess checker pawn jigsaw
drum guitar violin piano flute trumpet instrument play scene musical opera ballet recital rooftop chimney attic
basement porch patio deck balcony driveway sidewalk curb fountain statue monument lamppost streetlight signpost
mailbox hydrant billboard banner lantern torch firework firecracker sparkler shed greenhouse silo windmill well
vineyard meadow pasture plot lot yard lawn hedge crop bushel bale sack pallet vat tank canister keg flask vial beaker
test-tube thermos jug goblet saucer platter skillet wok ladle spatula whisk grater peeler chopstick straw coaster
placemat tablecloth ornament wreath gift present streamer parade festival carnival fair circus attraction
roller-coaster carousel booth stall stand kiosk counter receipt invoice cheque deposit payment installment tip bonus
salary wage paycheck allowance moth wasp hornet dragonfly grasshopper locust cockroach termite flea centipede
scorpion slug leech tadpole newt salamander gecko iguana chameleon python cobra viper tortoise clam oyster mussel
starfish jellyfish squid eel salmon trout tuna cod bass catfish carp minnow guppy betta angelfish stingray seahorse
urchin robin sparrow bluebird cardinal jay finch canary cockatoo parakeet macaw falcon hawk vulture crane heron stork
flamingo peacock pelican seagull gull ostrich emu gosling cygnet fawn cub foal pup gazelle antelope buffalo bison yak
mule hare chipmunk hedgehog porcupine skunk badger weasel ferret mink opossum armadillo anteater sloth chimpanzee ape
baboon orangutan lemur hyena jaguar panther cougar lynx jackal coyote hippopotamus rhinoceros reptile mammal creature
species herd flock litter oak pine maple birch cedar palm willow fern orchid carnation marigold geranium azalea peony
daffodil poppy blossom thorn sapling shrub bonsai atom molecule electron proton neutron ion photon gene virus organ
bone muscle drop droplet comet asteroid satellite spaceship galaxy orbit telescope microscope lens laser sensor
circuit resistor capacitor transistor processor pixel server router node link website webpage account user profile
tweet tag icon crossing stoplight signal ramp girder pillar arch pier dock mast ink ream sector quadrant domain stage
layer tier rung coloring labeling tiling cycle loop clique matching subgraph subtree spanning-tree subgroup
lattice-point midpoint centroid median altitude tangent secant semicircle octahedron icosahedron dodecahedron cuboid
trapezium subinterval partition subarray substring palindrome anagram codeword vowel consonant syllable handshake
greeting hug trial toss
""")
_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "teeth": "tooth", "feet": "foot", "oxen": "ox", "knives": "knife", "leaves": "leaf", "loaves": "loaf", "shelves":
    "shelf", "bookshelves": "bookshelf", "calves": "calf", "wolves": "wolf", "scarves": "scarf", "vertices":
    "vertex", "matrices": "matrix", "axes": "axis", "dice": "die", "die": "die", "pence": "penny", "grandchildren":
    "grandchild", "squares": "square", "cubes": "cube", "sheep": "sheep", "fish": "fish", "deer": "deer", "scissors":
    "scissor", "glasses": "glass", "times": "times", "ways": "way", "minutes": "minute", "polyhedra": "polyhedron",
    "cacti": "cactus", "series": "series", "points": "point",
}  # fmt: skip
_UNSAFE = _words("""
act bill call check combination cost couple cube discount draw exit expense fee flip good hit level light
like loan lock mark match mortgage multiple negative order point power price quadruple quarter root run score set
square string tax term text tick toll triple turn withdrawal
quarters roots combinations multiples couples orders strings negatives
""")
"""Nouns that change a number, or may change it in the singular: `5 square`, `5 quarters`."""

ADJECTIVES = set(
    _words("""
red blue green yellow orange purple pink white black brown gray grey gold silver golden big small large little
tiny tall long new old full whole fresh ripe ordered distinct different possible real rational positive natural
even odd prime complex unique correct equal congruent isosceles right acute square integral total valid good
lucky hot cold sweet paper plastic wooden metal glass chocolate vanilla soccer birthday tennis baseball
basketball football ice cream school adult math science history fiction comic trading playing bowling toy bus
train movie concert more additional extra baby dvd pokemon beach
""")
)
"""Words before a noun."""

ALONE = set(_words("left leftover remaining total altogether overall profit"))
"""Words that say what was counted, and may stand without a unit."""

FILLERS = ALONE | set(
    _words("""
each more later ago old tall high wide long deep thick away apart sold bought eaten read used saved earned spent
made needed required collected heavier taller longer older faster farther higher wider deeper
""")
)
"""Words after a unit that say what was counted."""

PREPOSITIONS = set(_words("from at on for with by in"))
DETERMINERS = set(_words("the his her its their my our your all both every each this that a an"))


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:[sxz]|ch|sh|ato|ango)$", noun) else "s")


NOUNS = {plural: noun for noun in _NOUNS for plural in (noun, _plural(noun))} | _IRREGULAR
"""From the singular and the plural of a thing to its singular."""

for _noun in _UNSAFE:
    NOUNS.pop(_noun, None)
