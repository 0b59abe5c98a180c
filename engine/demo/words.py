"""Word lists of the demo corpus: names, words, countries, animals, places.

Data only; knows nothing of how they are used.
"""

from __future__ import annotations

NAMES = tuple(
    """Ada Alan Albert Alice Amir Amy Ana Andrea Anton Aria Arthur Astrid Basil Bella Ben Boris Bruno Carl Carla Carmen
Cecil Chen Clara Cleo Cora Dan Daisy David Diego Dora Dylan Edgar Edith Elena Eli Ella Elsa Emil Emma Enzo Erik
Esther Eva Fay Felix Finn Flora Frank Frida Gabriel Gina Greta Gus Hana Hannah Harold Hazel Hector Heidi Helen Henry
Hugo Ida Igor Ines Ingrid Irene Iris Isaac Ivan Ivy Jack Jacob James Jane Jasper Jay Joan Joel John Jonas Jose
Judith Julia Jun Kai Karl Kate Keiko Kira Klaus Lara Laura Lea Lena Leo Leon Liam Lila Lily Lina Louis Lucas Lucy
Luna Mara Marco Maria Mark Marta Martin Mary Mateo Max Maya Mei Mia Mila Milo Mina Mira Mona Nadia Nina Noah Nora
Olaf Olga Oliver Omar Oscar Otto Owen Pablo Paul Paula Pedro Penny Pia Priya Quinn Rafael Ravi Rita Robin Rosa Ruby
Ruth Sam Sara Sasha Selma Sofia Stella Sven Tara Theo Tim Tina Tom Tove Uma Umar Vera Victor Viola Wanda Wei Will
Xena Yara Yuki Yusuf Zara Zoe""".split()
)
# Syllables of made-up names, so that a name nobody has seen still splits into known pieces.
ONSETS = tuple("B Br C Ch D Dr F Fl G Gr H J K Kr L M N P Pr R S Sh St T Th Tr V W Y Z".split())
VOWELS = tuple("a e i o u ai ea ia io".split())
CODAS = tuple(
    "bin da del dor fin gan la lan len lin lo ma min mon na nel ni nor ra ren ric rin ro sa sel son ta ten vin".split()
)

WORDS = tuple(
    """acorn actor anchor angel ankle ant apple apron arch arm arrow autumn axe baby badge bag baker ball banana band
bank barn basket bat bath beach beads beak bean bear beard bed bee bell belt bench berry bicycle bird biscuit blanket
boat bone book boot bottle bowl box boy branch brass bread brick bridge broom brush bucket bud bulb bus bush butter
button cabin cable cactus cake camel camera camp canal candle candy cap cape car card carpet carrot cart castle cat
cave ceiling chain chair chalk cheese cherry chess chest chicken child chin circle circus city clay clock cloth
cloud clown coal coast coat coffee coin collar comb cook copper cork corn cottage cotton cousin cow crab cradle
crayon cream creek crow crown crumb crystal cup curtain daisy dance deer desert desk diamond dinner dish doctor dog
doll dollar dolphin door dragon drawer dream dress drum duck dust eagle ear earth echo egg elbow elephant engine eye
fabric face fan farm feather fence fern field fig finger fire fish flag flame flour flower flute fly fog forest fork
fox frame friend frog fruit game garden garlic gate ghost giant ginger girl glass globe glove goat gold goose grape
grass guitar hall hammer hand harbour harp hat hawk hay head heart hedge helmet hen herb hill honey hook horn horse
hotel house ice idea ink insect iron island ivory jacket jam jar jelly jewel joke juice jungle kettle key king
kitchen kite kitten knee knife knot lace ladder lake lamb lamp lantern leaf leather lemon letter library light lily
lime lion lip lizard lock log lunch magnet map marble market mask match meadow melon metal milk mill mint mirror
mist monkey moon mop moth mountain mouse mouth mud muffin mule museum music nail napkin neck needle nest net night
noise noodle nose nurse nut oak oar ocean office oil olive onion orange orchard otter oven owl ox oyster page paint
palace pan panda paper parade park parrot party paste path peach pear pearl pebble pen pencil pepper piano picture
pie pig pigeon pillow pilot pin pine pipe pirate pizza planet plant plate plum pocket poem pond pony pool poppy post
pot potato powder prince puddle pump puppet purse puzzle queen quilt rabbit radio rain rake raven ribbon rice ring
river road robe robot rock roof room root rope rose rug ruler sack saddle sail salad salt sand sauce scarf school
scissors screw sea seal seed shadow sheep shelf shell ship shirt shoe shop shovel silk silver sink skirt sky sled
sleeve smile smoke snail snake snow soap sock sofa soil song soup spade spider spoon spring square squirrel stable
stamp star station steam steel stem stick stone stool storm stove straw street string sugar summer sun swan sweater
table tail tailor tea teacher tent thread throat thumb thunder ticket tiger tile toast toe tomato tongue tooth towel
tower town toy train tray treasure tree truck trumpet tulip tunnel turkey turtle umbrella uncle valley van vase vest
village violin voice wagon walnut wall watch water wave wax weed whale wheat wheel whistle willow wind window wine
wing winter wolf wood wool worm yard yarn zebra zipper red blue green yellow purple brown black white pink grey
small tall quick slow warm cold happy brave quiet loud""".split()
)

CAPITALS = {
    "Albania": "Tirana", "Algeria": "Algiers", "Argentina": "Buenos Aires", "Australia": "Canberra",
    "Austria": "Vienna",
    "Bangladesh": "Dhaka", "Belgium": "Brussels", "Bolivia": "Sucre", "Brazil": "Brasilia", "Bulgaria": "Sofia",
    "Cambodia": "Phnom Penh", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota",
    "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia", "Denmark": "Copenhagen", "Ecuador": "Quito",
    "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris",
    "Georgia": "Tbilisi", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest",
    "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad",
    "Ireland": "Dublin", "Israel": "Jerusalem", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo",
    "Jordan": "Amman", "Kenya": "Nairobi", "Latvia": "Riga", "Lebanon": "Beirut", "Lithuania": "Vilnius",
    "Luxembourg": "Luxembourg", "Malaysia": "Kuala Lumpur", "Malta": "Valletta", "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu", "New Zealand": "Wellington",
    "Nigeria": "Abuja", "Norway": "Oslo", "Pakistan": "Islamabad", "Panama": "Panama City", "Peru": "Lima",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Singapore": "Singapore", "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana", "Somalia": "Mogadishu", "South Korea": "Seoul", "Spain": "Madrid", "Sweden": "Stockholm",
    "Switzerland": "Bern", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Ukraine": "Kyiv",
    "Uruguay": "Montevideo", "Venezuela": "Caracas", "Vietnam": "Hanoi",
}  # fmt: skip
CITIES = tuple(
    sorted({*CAPITALS.values(), "New York", "Boston", "Chicago", "Munich", "Milan", "Lyon", "Porto", "Osaka", "Mumbai",
            "Sydney", "Toronto", "London", "Seville", "Hamburg", "Geneva", "San Francisco", "Los Angeles", "Cape Town"})
)  # fmt: skip

ANIMALS = ("fox", "cat", "dog", "rabbit", "bear", "owl", "mouse", "horse", "turtle", "duck", "deer", "wolf", "frog",
           "goat", "hedgehog", "squirrel", "otter", "badger", "swan", "lion")  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "pink", "grey", "brown", "silver")
JOBS = ("baker", "teacher", "doctor", "pilot", "painter", "farmer", "nurse", "cook", "singer", "writer", "tailor",
        "sailor")  # fmt: skip
FOODS = ("pizza", "soup", "pasta", "rice", "salad", "bread", "cake", "curry", "pancakes", "noodles", "cheese", "apples")
SKIES = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "stormy", "clear")
ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "hall", "office", "living room", "garden", "cellar")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Greek", "Polish", "Japanese", "Swedish", "Turkish", "Hindi")
