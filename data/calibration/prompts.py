"""What the models are asked for. `make.py` says how.

A class of documents has a budget in bytes, the model that writes it, how a document is made of prompt and answer
(`form`), and its prompts: every template meets topics in turn, so that neighbours differ in both.
"""

PLACES_AND_NATURE = """the Atlantic salmon|glaciers|the human heart|honeybees|the planet Jupiter|volcanoes|river deltas|the octopus|bamboo
coral reefs|the Sahara|snow leopards|thunderstorms|the water cycle|mushrooms|earthquakes|owls|tides|the Moon|rainforests|penguins
fossils|desert plants|migration of birds|the atmosphere|whales|limestone caves|wheat|the immune system|sleep""".replace("\n", "|").split("|")
PEOPLE_AND_THINGS = """the printing press|paper making|bridges|ancient trade routes|the bicycle|glass blowing|lighthouses|the potato
chess|the calendar|maps|coffee|the violin|railways|democracy|money|medieval towns|the telescope|bread|vaccines|the Roman army
canals|ceramics|the piano|public libraries|the compass|silk|the steam engine|theatre|the Olympic Games""".replace("\n", "|").split("|")
HEROES = """a lighthouse keeper|two sisters|an old clockmaker|a shy dragon|a young cook|a lost astronaut|a village doctor|a street musician
a girl who collects stones|a retired pilot|a fox and a crow|a night train conductor|a baker's son|a gardener|a thief with a conscience
an apprentice cartographer|a robot in a junkyard|twins on a farm|a letter carrier|a librarian""".replace("\n", "|").split("|")
TROUBLES = """who must choose between two promises|during the longest winter|who finds a map in a wall|and a secret that cannot be kept
after the river rises|on the last day of summer|and a stranger at the door|who wants to win a contest|and a broken bridge
who learns to apologise|in a city without lamps|and a machine that predicts the weather""".replace("\n", "|").split("|")
EVERYDAY = """writing a polite complaint about a late parcel|planning a week of cheap dinners|learning to swim as an adult|moving to a new city
preparing for a job interview|saving money on heating|choosing a used car|getting a child to read|organising a small wedding|growing tomatoes
fixing a dripping tap|asking the boss for a day off|starting to run|writing a speech for a birthday|sleeping better|caring for an old dog
learning a language in a year|packing for a mountain hike|a quarrel with a neighbour about noise|cooking rice|setting up a home office
a first visit to a museum|cleaning a greasy oven|choosing a gift for a colleague|studying for an exam in physics|a slow laptop
remembering names|a picnic for ten people|cutting sugar|adopting a cat""".replace("\n", "|").split("|")
QUESTIONS = """Why is the sky blue during the day and red in the evening?|How does a refrigerator keep food cold?|Why do leaves change colour in autumn?
What makes bread rise?|How do vaccines protect people?|Why does ice float on water?|How do aeroplanes stay in the air?|What causes inflation?
Why do we have leap years?|How does a battery store energy?|What is the difference between weather and climate?|How do plants make food?
Why are some metals magnetic?|How does the kidney work?|What is a black hole?|Why do cats purr?|How do computers store numbers?|What is a prime number?
How are mountains formed?|Why do people dream?|How does soap clean?|What is the stock market?|Why is the sea salty?|How does a camera make a picture?
What was the silk road?|How do bees make honey?|What does a judge do?|How do submarines dive?|Why does metal rust?|What is an ecosystem?
How does the internet find a website?|Why do onions make us cry?|How is glass made?|What is gravity?|How do tides work?|What is a virus?""".replace("\n", "|").split("|")
TECHNICAL = """how a hash table resolves collisions|how TCP recovers from lost packets|virtual memory and page faults|how a compiler allocates registers
B-trees in databases|garbage collection|how TLS sets up a connection|cache coherence between processor cores|version control with branches and merges
containers and virtual machines|consistent hashing|floating-point rounding errors|mutexes, semaphores and deadlocks|how a CPU pipeline predicts branches
public-key cryptography|matrix multiplication on a GPU|how DNS resolves a name|transactions and isolation levels|Unicode and UTF-8|regular expressions and automata
gradient descent|attention in transformers|quantization of neural networks|message queues|load balancing|REST and GraphQL|file systems and journaling
unit tests and continuous integration|how JPEG compresses images|the design of a PID controller|lithium-ion batteries|how a switching power supply works
stress and strain in steel beams|error-correcting codes|radio modulation|optical fibres|heat pumps|stepper motors|PCR in the laboratory|mass spectrometry""".replace("\n", "|").split("|")
PROGRAMS = """parses a duration such as 1h30m into seconds|finds the shortest path in a weighted graph|keeps the k largest numbers of a stream
counts words in a text and prints the most frequent ones|implements a least-recently-used cache|checks whether brackets are balanced
merges overlapping intervals|multiplies two matrices|reads a CSV file and computes column averages|implements a binary search tree with insert and search
encodes and decodes run-length compression|validates an e-mail address without regular expressions|converts Roman numerals|simulates a bank account with errors
solves the eight queens puzzle|generates all permutations of a list|implements a ring buffer|tokenizes an arithmetic expression|evaluates an expression in postfix notation
finds anagrams in a list of words|implements a priority queue with a heap|formats a table with aligned columns|walks a directory tree and sums file sizes
retries an operation with exponential backoff|computes a moving average|draws the Mandelbrot set as text|implements Conway's game of life
computes a checksum of a byte string|sorts records by two keys|implements a trie for autocompletion|splits work among threads|implements a state machine for a traffic light""".replace("\n", "|").split("|")
WEB = """a page of a small bakery|a registration form with validation|a navigation bar with a dropdown|a table of train departures|a photo gallery with captions
a login dialog|a pricing section with three columns|a blog article with a sidebar|a timeline of events|an accessible accordion|a card grid of products|a contact page""".replace("\n", "|").split("|")
DATABASES = """orders and customers of a shop|employees, departments and salaries|books, authors and loans of a library|flights, airports and bookings
sensors and their hourly measurements|students, courses and grades|posts, comments and likes|invoices and payments|hotel rooms and reservations|parts and suppliers""".replace("\n", "|").split("|")
SHELL = """makes a dated backup of a directory and deletes old ones|renames photos by their date|watches a log file and counts errors by hour
checks that a list of services is running|finds the ten largest files|converts all PNG files to JPEG in parallel|deploys a static site|rotates log files
reads options with getopts and prints usage|monitors disk space and sends a message""".replace("\n", "|").split("|")
RECORDS = """a list of five employees with addresses and skills|the configuration of a web server with routes and limits|a weather forecast for a week
an order with line items, taxes and shipping|a JSON Schema for a user profile|package.json of a small tool|an OpenAPI description of a to-do service
a GeoJSON collection of three places|the state of a board game|a recipe with ingredients and steps|metrics of a machine in nested objects|a playlist with tracks""".replace("\n", "|").split("|")
MATHEMATICS = """Solve the equation 3x^2 - 7x + 2 = 0 step by step.|A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Explain each step.
Prove that the square root of 2 is irrational.|Compute the derivative of f(x) = x^2 sin(x) and explain the rules used.|Find the integral of x e^x and check it.
A shop raises a price by 20 % and then lowers it by 20 %. What is the net change? Show the working.|Explain the binomial theorem with an example in LaTeX.
Prove by induction that 1 + 2 + ... + n = n(n+1)/2.|A bag holds 5 red and 7 blue balls. Two are drawn. Compute the probabilities of all outcomes.
Solve the system 2x + 3y = 12, x - y = 1.|Explain eigenvalues with a 2x2 example.|Show that there are infinitely many primes.
Compute 17 * 24, 348 / 12 and 15^3 and explain how to do it in the head.|What is the area of a triangle with sides 7, 8 and 9? Use Heron's formula.
Explain the chain rule with three examples in LaTeX.|Find the limit of (1 + 1/n)^n and explain why it exists.|Convert 0.375 to a fraction and to binary, step by step.
A tank fills in 6 hours with one pipe and 4 hours with another. How long with both?|Explain Bayes' theorem with a medical test.|Compute the mean, median, variance and standard deviation of 4, 8, 15, 16, 23, 42.
Prove that the sum of the angles of a triangle is 180 degrees.|Explain modular arithmetic and compute 7^100 mod 13.|How many ways can 8 people sit at a round table? Explain.
Find the equation of the line through (2, 3) and (5, 11).|Explain the Fourier series of a square wave in LaTeX.|Solve the differential equation y' = 2y with y(0) = 3.
Explain matrix inversion with a 2x2 example in LaTeX.|A ladder of 5 m leans on a wall, its foot 3 m away. How high does it reach? Vary the numbers twice.
Explain the difference between permutations and combinations with examples.|Derive the quadratic formula by completing the square, in LaTeX.
Estimate how many piano tuners work in a city of three million people.|Compute compound interest on 1000 euros at 4 % for 10 years with a table by year.
Explain logarithms and solve 2^x = 40.|Find the greatest common divisor of 252 and 198 with Euclid's algorithm.|Explain the normal distribution and the 68-95-99.7 rule.
Sum the geometric series 1 + 1/3 + 1/9 + ... and explain when it converges.""".replace("\n", "|").split("|")
DOCUMENTS = """a comparison of five programming languages|a two-week training plan for runners|release notes of a photo editor|a README for a command-line calculator
a checklist for moving house|meeting minutes of a small team|a comparison of heating systems|a glossary of twelve terms of sailing|a timetable of a school day
a troubleshooting guide for a printer|a nutrition table of ten foods|an FAQ of a city library|a specification of a toy protocol|the budget of a student
a study plan for linear algebra|the planets with their diameter and distance|a recipe book index|a risk register of a building project|a style guide for e-mails
an itinerary for four days in the mountains|API documentation of a weather service|a table of units and conversions|a postmortem of a failed deployment
a packing list by category|a comparison of three databases""".replace("\n", "|").split("|")

# language -> (characters that a text must mostly be made of, or words of which some must occur; templates; topics)
LANGUAGES = {
    "German": ("der die und ist von", "Schreibe einen Sachtext über {}.|Erzähle eine kurze Geschichte über {}.|Erkläre einem Kind {}.",
               "die Bienen|einen alten Bahnhof|das Wetter in den Alpen|den Buchdruck|eine Reise ans Meer|die Feuerwehr"),
    "French": ("les des est une dans", "Écris un texte d'information sur {}.|Raconte une courte histoire sur {}.|Explique simplement {}.",
               "la vie des abeilles|un vieux phare|la cuisine du marché|le cycle de l'eau|un voyage en train|la musique de rue"),
    "Spanish": ("los que una las del", "Escribe un texto informativo sobre {}.|Cuenta una historia breve sobre {}.|Explica de forma sencilla {}.",
                "los volcanes|un faro abandonado|la vida en el desierto|el origen del pan|un viaje en barco|las bibliotecas"),
    "Italian": ("che una della per con", "Scrivi un testo informativo su {}.|Racconta una breve storia su {}.|Spiega in modo semplice {}.",
                "il ciclo dell'acqua|un vecchio orologiaio|la vita in montagna|il pane|un viaggio in treno|le stelle"),
    "Portuguese": ("que uma para com dos", "Escreva um texto informativo sobre {}.|Conte uma história curta sobre {}.|Explique de forma simples {}.",
                   "as abelhas|um farol antigo|a floresta tropical|o café|uma viagem de barco|os vulcões"),
    "Dutch": ("het een van de en", "Schrijf een informatieve tekst over {}.|Vertel een kort verhaal over {}.|Leg eenvoudig uit: {}.",
              "de dijken|een oude molen|het weer aan zee|de fiets|een reis per trein|bijen"),
    "Polish": ("jest się na nie do", "Napisz krótki tekst o tym: {}.|Opowiedz krótką historię: {}.|Wyjaśnij prosto: {}.",
               "życie pszczół|stary zegarmistrz|góry zimą|historia chleba|podróż pociągiem|las jesienią"),
    "Turkish": ("bir ve için bu ile", "{} hakkında bilgilendirici bir metin yaz.|{} hakkında kısa bir hikâye anlat.|{} konusunu basitçe açıkla.",
                "Arılar|Eski bir deniz feneri|Dağlarda kış|Ekmeğin tarihi|Bir tren yolculuğu|Su döngüsü"),
    "Vietnamese": ("là và của các một", "Viết một bài ngắn về {}.|Kể một câu chuyện ngắn về {}.|Giải thích đơn giản về {}.",
                   "loài ong|ngọn hải đăng cũ|mùa mưa|lịch sử của giấy|một chuyến tàu|rừng nhiệt đới"),
    "Russian": ("Ѐ-ӿ", "Напиши познавательный текст на тему «{}».|Расскажи короткую историю на тему «{}».|Объясни простыми словами тему «{}».",
                "жизнь пчёл|старый маяк|зима в горах|история хлеба|путешествие на поезде|круговорот воды"),
    "Chinese": ("一-鿿", "请写一篇关于{}的科普短文。|请讲一个关于{}的小故事。|请用简单的语言解释{}。",
                "蜜蜂|老灯塔|山里的冬天|造纸术|坐火车旅行|水循环"),
    "Japanese": ("぀-ヿ一-鿿", "{}について説明する文章を書いてください。|{}についての短い物語を書いてください。|{}を子供にわかるように説明してください。",
                 "ミツバチ|古い灯台|山の冬|紙の歴史|電車の旅|水の循環"),
    "Korean": ("가-힯", "{}에 대한 설명문을 한국어로 써 주세요.|{}에 대한 짧은 이야기를 한국어로 써 주세요.|{}을(를) 쉽게 한국어로 설명해 주세요.",
               "꿀벌|오래된 등대|산의 겨울|종이의 역사|기차 여행|물의 순환"),
    "Arabic": ("؀-ۿ", "اكتب نصًا تعريفيًا باللغة العربية عن {}.|احكِ قصة قصيرة باللغة العربية عن {}.|اشرح ببساطة وباللغة العربية {}.",
               "النحل|منارة قديمة|الشتاء في الجبال|تاريخ الورق|رحلة بالقطار|دورة الماء"),
    "Hindi": ("ऀ-ॿ", "{} के बारे में हिंदी में एक जानकारीपूर्ण लेख लिखिए।|{} के बारे में हिंदी में एक छोटी कहानी लिखिए।|{} को सरल हिंदी में समझाइए।",
              "मधुमक्खी|पुराना दीपस्तंभ|पहाड़ों की सर्दी|काग़ज़ का इतिहास|रेल यात्रा|जल चक्र"),
}


def cross(templates, topics, count):
    """`count` different prompts: template i with topic i, each round of topics shifted by one template."""
    templates = templates.split("|")
    made = []
    for i in range(count):
        turn, topic = divmod(i, len(topics))
        assert turn < len(templates), "too few templates for so many prompts"
        made.append(templates[(topic + turn) % len(templates)].format(topics[topic]))
    return made


def code(language, count, topics=PROGRAMS, templates=None, shift=0):
    topics = topics[shift:] + topics[:shift]
    templates = templates or f"Write a {language} program that {{}}, with comments.|Write {language} code that {{}}. Include tests.|In {language}: write a small module that {{}} and explain it briefly."
    return cross(templates, topics, count)


# name, model, bytes, form, (max_tokens, temperature, min_p, repetition_penalty), prompts
CLASSES = [
    ("encyclopedic", "smollm2", 90_000, "answer", (420, 0.9, 0.03, 1.0),
     cross("Write an encyclopedia article about {}.|Describe {} for a reference book: origin, properties and importance.|Give an overview of the history and science of {}.",
           PLACES_AND_NATURE + PEOPLE_AND_THINGS, 100)),
    ("stories", "smollm2", 75_000, "answer", (420, 1.0, 0.04, 1.0),
     [f"{('Write a short story about', 'Tell a tale with dialogue about', 'Write the opening chapter of a novel about')[i % 3]} {HEROES[i % len(HEROES)]} {TROUBLES[(i * 5 + i // len(HEROES)) % len(TROUBLES)]}."
      for i in range(80)]),
    ("chat", "smollm2", 42_000, "dialogue", (300, 0.9, 0.03, 1.0),
     cross("I need help with {}. What should I do?|Give me advice on {} in five steps.", EVERYDAY, 50)),
    ("instructions", "qwen", 35_000, "instruction", (300, 0.9, 0.05, 1.0),
     cross("Write clear instructions for {}.|Make a plan for {} and explain the reasons.", EVERYDAY[::-1], 32)),
    ("questions", "smollm2", 25_000, "question", (200, 0.8, 0.03, 1.0), QUESTIONS),
    ("answers", "qwen", 22_000, "question", (200, 0.8, 0.05, 1.0), [q + " Answer in one paragraph." for q in QUESTIONS[:28]]),
    ("technical", "qwen", 60_000, "answer", (380, 0.9, 0.05, 1.0),
     cross("Explain {} to an engineer in detail.|Write a section of a textbook on {}.", TECHNICAL, 41)),
    ("mathematics", "qwen", 45_000, "question", (380, 0.8, 0.05, 1.0), MATHEMATICS[:25]),
    ("markdown", "qwen", 38_000, "answer", (380, 0.9, 0.05, 1.0),
     cross("Write in Markdown, with headings, lists and a table: {}.|Write {} as a Markdown document with at least one table.", DOCUMENTS, 28)),
    ("rust", "qwen", 16_000, "code", (400, 0.8, 0.05, 1.0), code("Rust", 14)),
    ("python", "qwen", 20_000, "code", (400, 0.8, 0.05, 1.0), code("Python", 18, shift=5)),
    ("c", "qwen", 14_000, "code", (400, 0.8, 0.05, 1.0), code("C", 12, shift=11)),
    ("javascript", "qwen", 14_000, "code", (400, 0.8, 0.05, 1.0), code("JavaScript", 12, shift=17)),
    ("c++, java, go, typescript", "qwen", 24_000, "code", (400, 0.8, 0.05, 1.0),
     [p for i, language in enumerate(("C++", "Java", "Go", "TypeScript")) for p in code(language, 5, shift=3 + 7 * i)]),
    ("sql", "qwen", 8_000, "code", (350, 0.8, 0.05, 1.0),
     cross("Write SQL: tables, sample rows and three analytical queries for {}.|Write SQL queries with joins, grouping and window functions over {}.", DATABASES, 8)),
    ("shell", "qwen", 8_000, "code", (350, 0.8, 0.05, 1.0), cross("Write a bash script that {}.|Write a robust shell script that {}, with comments.", SHELL, 10)),
    ("html", "qwen", 10_000, "code", (420, 0.8, 0.05, 1.0), cross("Write HTML and CSS for {}.", WEB, 8)),
    ("json", "qwen", 8_000, "code", (350, 0.8, 0.05, 1.0), cross("Write as JSON: {}. Only the JSON.", RECORDS, 9)),
] + [
    (language, "qwen", 6_000, "answer", (380, 1.0, 0.05, 1.12), cross(templates, topics.split("|"), 8))
    for language, (_, templates, topics) in LANGUAGES.items()
]
