/* Loaded into all pages of the engine behind its libraries and before its own scripts:
   - what the engine puts into its pages as it comes (descriptions, errors) cannot be markup there;
   - an upload that is refused before it reaches the site is told in a sentence, too;
   - the one address that the engine calls without the prefix of the site gets it;
   - the page of activity renews itself. */
(function ($) {
    var prefix = document.currentScript.src.replace(/^https?:\/\/[^\/]*/, '')
                                           .replace(/\/static\/js\/.*$/, '');

    function escaped(text) {
        return $('<i>').text(text).html();
    }

    /* It goes into attributes, from which it is taken and put into a page again. */
    function tame(text) {
        return text.replace(/&/g, '&amp;').replace(/</g, '\u2039').replace(/>/g, '\u203a')
                   .replace(/"/g, '\u201d');
    }

    /* Do something with each text of an answer, whatever its form. */
    function each_text(value, change) {
        if (typeof value === 'string') {
            return change(value);
        }
        if (value !== null && typeof value === 'object') {
            $.each(value, function (key, inner) {
                value[key] = each_text(inner, change);
            });
        }
        return value;
    }

    function sentence(status) {
        if (status === 413) {
            return 'These files are more than this site, or a proxy before it, takes.';
        }
        if (status === 0) {
            return 'The connection was closed while the files were sent: they may be more than ' +
                   'this site takes, or the network is down.';
        }
        return 'The site has answered with the status ' + status + '.';
    }

    $.ajaxPrefilter(function (options) {
        var shown = options.error;
        if (options.url.indexOf('/v1/') === 0) {
            options.url = prefix + options.url;
        }
        if (/\/v1\/calc\/list(\?|$)/.test(options.url)) {
            options.dataFilter = function (text) {
                return JSON.stringify(each_text(JSON.parse(text), tame));
            };
        } else if (/\/traceback$/.test(options.url)) {
            options.dataFilter = function (text) {
                return JSON.stringify(each_text(JSON.parse(text), escaped));
            };
        }
        if (/^post$/i.test(options.type) && shown) {
            options.error = function (answer) {
                var found;
                try {
                    found = JSON.parse(answer.responseText);
                } catch (error) {
                    found = {error: sentence(answer.status)};
                }
                answer.responseText = JSON.stringify(each_text(found, escaped));
                return shown.apply(this, arguments);
            };
        }
    });

    $(function () {
        if ($('#activity').length) {
            window.setInterval(function () {
                $('#activity').load(window.location.href + ' #activity > *', function () {
                    if (!$('#activity').children().length) {
                        window.location.reload();  // the session has ended
                    }
                });
            }, 3000);
        }
    });
}(jQuery));
