// Renders a chat template with llama.cpp's own Jinja engine (common/jinja); built and driven by llama_templates.py.
//
//     llama_templates TEMPLATE < VARIABLES   one JSON object a line in, a text or "ERROR ..." out, each ended by \x01
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

extern "C" [[noreturn]] void ggml_abort(const char *, int, const char *, ...) { std::abort(); }

static std::string render(const std::string & source, const std::string & variables) {
    jinja::lexer lexer;
    jinja::program program = jinja::parse_from_tokens(lexer.tokenize(source));
    jinja::context context(source);
    jinja::global_from_json(context, common_json::parse(variables), true);
    jinja::runtime runtime(context);
    return jinja::runtime::gather_string_parts(runtime.execute(program))->as_string().str();
}

int main(int, char ** arguments) {
    std::ifstream file(arguments[1]);
    std::stringstream source;
    source << file.rdbuf();
    for (std::string line; std::getline(std::cin, line);) {
        try {
            std::cout << render(source.str(), line);
        } catch (const std::exception & error) {
            std::cout << "ERROR " << error.what();
        }
        std::cout << '\x01' << std::flush;
    }
}
